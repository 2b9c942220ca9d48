"""Telling TensorRT's packages apart. Of other versions than the installed one, only which names exist is known here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssod.deploy.trt import (
    check_capabilities,
    has_timing_cache,
    known_capabilities,
    load_trt,
    log_of,
    network_flags,
    precision_flags,
    readable,
    runs_on,
)
from ssod.errors import UserError


def surface(network: dict[str, int], builder: list[str], rtx: bool = False) -> Any:
    """The names of a version that the functions below ask for; nothing can be built with it."""
    config = SimpleNamespace(set_compute_capability=None) if rtx else SimpleNamespace()
    return SimpleNamespace(
        __name__="tensorrt_rtx" if rtx else "tensorrt",
        NetworkDefinitionCreationFlag=SimpleNamespace(**network),
        BuilderFlag=SimpleNamespace(**{name: name for name in builder}),
        IBuilderConfig=config,
    )


WEAK = ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"]
V8 = surface({"EXPLICIT_BATCH": 0}, WEAK)
V10 = surface({"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, WEAK)
V11 = surface({"STRONGLY_TYPED": 1}, ["TF32"])
WITHOUT_FLAGS = surface({}, ["TF32"])  # where strong typing is all there is, its flag may go too


def test_explicit_batch_and_strong_types_are_asked_for_where_they_exist() -> None:
    assert [network_flags(v) for v in (V8, V10, V11, WITHOUT_FLAGS)] == [0b01, 0b11, 0b10, 0]


def test_precision_is_allowed_by_flags_where_types_are_hints() -> None:
    assert precision_flags(V8, "fp32") == []
    assert precision_flags(V8, "fp16") == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    assert precision_flags(V8, "int8") == ["INT8"]
    for strong in (V10, V11, WITHOUT_FLAGS):
        assert [precision_flags(strong, p) for p in ("fp32", "fp16", "int8")] == [[], [], []]


def test_tensorrt_builds_for_its_own_gpu_and_has_a_timing_cache() -> None:
    assert has_timing_cache(V8)
    assert check_capabilities(V10, []) == []
    with pytest.raises(UserError, match="tensorrt builds for the GPU of this machine alone"):
        check_capabilities(V10, ["sm86"])
    assert runs_on(V10, ["sm90"], "sm90")
    assert not runs_on(V10, ["sm90"], "sm86")


def test_capabilities_of_the_installed_rtx() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    assert not has_timing_cache(rtx)
    assert {"sm75", "sm86", "sm89", "sm120"} <= set(known_capabilities(rtx))
    assert check_capabilities(rtx, ["SM86", "sm89", "sm86"]) == ["sm86", "sm89"]
    with pytest.raises(
        UserError, match=r"does not build for sm90; it knows sm75, .*sm120.*H200 \(sm90\), need"
    ) as error:
        check_capabilities(rtx, ["sm86", "sm90"])
    assert "ssod[trt]" in str(error.value)
    # Built for none by name: Ampere and later. Turing only by name; what the package does not know, never.
    assert [runs_on(rtx, [], sm) for sm in ("sm75", "sm86", "sm90", "sm120")] == [False, True, False, True]
    assert runs_on(rtx, ["sm75"], "sm75")
    assert not runs_on(rtx, ["sm86"], "sm89")


def test_flags_of_the_installed_rtx() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    assert network_flags(rtx) == 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert precision_flags(rtx, "fp16") == []


def install(name: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of one file, gone again after the test even if it was imported."""
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, name)
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)


def test_none_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    for flavour in ("auto", "tensorrt", "tensorrt_rtx"):
        with pytest.raises(UserError, match="not installed") as error:
            load_trt(flavour)
        assert "ssod[trt]" in str(error.value)
        assert "ssod[rtx]" in str(error.value)
        assert "H200" in str(error.value)


def test_the_flavour_asked_for_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match="tensorrt is not installed"):
        load_trt("tensorrt")
    with pytest.raises(UserError, match="Did you mean 'tensorrt_rtx'"):
        load_trt("tensorrt-rtx")


def test_auto_prefers_tensorrt_unless_capabilities_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        install(name, "", tmp_path, monkeypatch)
    assert load_trt().__name__ == "tensorrt"
    assert load_trt(capabilities=["sm86"]).__name__ == "tensorrt_rtx"


def test_a_package_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "raise ImportError('libnvinfer.so.10: cannot open\\nshared object file')"
    install("tensorrt", code, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"libnvinfer.so.10: cannot open shared object file.*ssod\[trt\]"):
        load_trt("tensorrt")


def test_the_log_keeps_errors_and_prints_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    log = log_of(rtx)
    assert log_of(rtx) is log  # TensorRT would send a second one's messages to the first
    log.start(verbose=True)
    log.log(rtx.ILogger.VERBOSE, "tactics")
    log.log(rtx.ILogger.INFO, "memory")
    log.log(rtx.ILogger.ERROR, "no runner")
    assert log.errors == ["no runner"]
    assert capsys.readouterr().err == "tensorrt_rtx: memory\ntensorrt_rtx: no runner\n"
    log.start(verbose=False)
    log.log(rtx.ILogger.ERROR, "again")
    assert log.errors == ["again"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (
            "[tacticSupply.cpp::getSupportedFormats::48] Error Code 2: Internal Error (Assertion !layerImpls.empty() "
            "failed. my_nms_68 has no runners that implement it In getSupportedFormats at /_src/builder/tactic.cpp:48)",
            "my_nms_68 has no runners that implement it",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Network has dynamic or shape inputs, but "
            "no optimization profile has been defined. In validate at /_src/optimizer/api/network.cpp:4023)",
            "Network has dynamic or shape inputs, but no optimization profile has been defined",
        ),
        (
            "[localCheckMacros.cpp::getErrorStr::132] Error Code 2: OutOfMemory (Requested size was 395559332 bytes.)",
            "OutOfMemory: Requested size was 395559332 bytes",
        ),
        ("ModelImporter.cpp:151: ERROR: Axes\n  must be sorted.", "ERROR: Axes must be sorted"),
        (
            "Assertion failed: creator && version(creator) == Version::kV3: no NonZero plugin is in the registry!",
            "no NonZero plugin is in the registry",
        ),
        ('(antialias == 0) && "Antialiasing is not supported currently."', "Antialiasing is not supported currently"),
        ("false", "it is not supported"),
    ],
)
def test_messages_without_what_only_their_authors_can_read(message: str, text: str) -> None:
    assert readable(message) == text
