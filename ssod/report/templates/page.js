"use strict";
(() => {
  const root = document.documentElement, $ = (id) => document.getElementById(id);
  root.classList.add("js");

  // Light or dark: the system's, until the button says otherwise; a page from a file may not be allowed to remember.
  const store = (value) => { try { return value ? localStorage.setItem("theme", value) : localStorage.getItem("theme"); } catch { return null; } };
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  if (["light", "dark"].includes(store())) root.dataset.theme = store();
  $("theme").onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; store(root.dataset.theme); };

  // Tabs: without script all parts stand one below the other.
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const show = (id, focus) => {
    if (!tabs.some((t) => t.hash === "#" + id)) return;
    for (const tab of tabs) {
      const on = tab.hash === "#" + id;
      tab.setAttribute("aria-selected", on);
      tab.tabIndex = on ? 0 : -1;
      $(tab.hash.slice(1)).hidden = !on;
      if (on && focus) tab.focus();
    }
  };
  for (const [i, tab] of tabs.entries()) {
    tab.onclick = (e) => {
      e.preventDefault();
      show(tab.hash.slice(1));
      try { history.replaceState(null, "", tab.hash); } catch { location.hash = tab.hash; }
      if (tabs[0].parentNode.getBoundingClientRect().top <= 0) scrollTo({ top: tabs[0].parentNode.offsetTop, behavior: "instant" });
    };
    tab.onkeydown = (e) => {
      const way = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
      if (way) { e.preventDefault(); show(tabs[(i + way + tabs.length) % tabs.length].hash.slice(1), true); }
    };
  }
  if (tabs.length) { show(tabs[0].hash.slice(1)); show(location.hash.slice(1)); }
  addEventListener("hashchange", () => show(location.hash.slice(1)));

  // Charts: read values off the curves at the pointer.
  const short = (v) => (Math.abs(v) >= 100 ? v.toFixed(0) : Math.abs(v) >= 10 ? v.toFixed(1) : v.toFixed(3));
  for (const svg of document.querySelectorAll(".chart > svg")) {
    const curves = [...svg.querySelectorAll("polyline[data-name]")].map((p) => [p, [...p.points].map((q) => [q.x, q.y])]);
    if (!curves.length) continue;
    const [left, right, top, bottom] = svg.dataset.box.split(",").map(Number), [x0, x1, y0, y1] = svg.dataset.range.split(",").map(Number);
    const guide = document.createElementNS("http://www.w3.org/2000/svg", "line"), tip = document.createElement("div");
    guide.setAttribute("class", "guide"); tip.className = "tip"; tip.hidden = true;
    svg.parentNode.append(tip);
    svg.onpointermove = (e) => {
      const frame = svg.getBoundingClientRect(), at = ((e.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width;
      let x = null;
      for (const [, points] of curves) for (const [px] of points) if (x === null || Math.abs(px - at) < Math.abs(x - at)) x = px;
      for (const [k, v] of Object.entries({ x1: x, x2: x, y1: top, y2: bottom })) guide.setAttribute(k, v);
      svg.append(guide);
      const head = document.createElement("b");
      head.textContent = short(x0 + ((x - left) / (right - left)) * (x1 - x0)).replace(/\.?0+$/, (m) => (m[0] === "." ? "" : m));
      tip.replaceChildren(head);
      for (const [line, points] of curves) {
        const near = points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
        if (Math.abs(near[0] - x) > 3) continue;
        const row = document.createElement("div");
        row.textContent = line.dataset.name + " " + short(y0 + ((bottom - near[1]) / (bottom - top)) * (y1 - y0));
        tip.append(row);
      }
      tip.hidden = false;
      const box = svg.parentNode.getBoundingClientRect(), far = x > (left + right) / 2;
      const place = (x / svg.viewBox.baseVal.width) * frame.width + frame.left - box.left;
      tip.style.top = frame.top - box.top + 8 + "px";
      tip.style.left = far ? "auto" : place + 10 + "px";
      tip.style.right = far ? box.width - place + 10 + "px" : "auto";
    };
    svg.onpointerleave = () => { tip.hidden = true; guide.remove(); };
  }

  // The film: boxes of each step as numbers, drawn over thumbnails that are there once.
  if (!$("film-data")) return;
  const film = JSON.parse($("film-data").textContent), figures = [...document.querySelectorAll("#film [data-image]")];
  const draw = (svg, boxes) => svg.replaceChildren(...boxes.map(([x, y, width, height, label, score, kept, reason]) => {
    const box = document.createElementNS("http://www.w3.org/2000/svg", "rect"), title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    for (const [k, v] of Object.entries({ x, y, width, height, class: kept ? "solid" : "dashed" })) box.setAttribute(k, v);
    box.style.setProperty("--h", film.hues[label]);
    title.textContent = film.names[label] + " " + (score / 100).toFixed(2) + ": " + film.reasons[reason];
    box.append(title);
    return box;
  }));
  const step = (at) => {
    const sums = [0, 0];
    for (const figure of figures) {
      const boxes = film.images[figure.dataset.image][at], [kept, dropped] = film.totals[figure.dataset.image][at];
      draw(figure.querySelector(".boxes"), boxes);
      figure.querySelector(".count").textContent = kept + " kept, " + dropped + " dropped";
      sums[0] += kept; sums[1] += dropped;
    }
    $("film-now").textContent = film.steps[at];
    $("film-said").textContent = sums[0] + " boxes kept, " + sums[1] + " dropped";
  };
  $("film-step").oninput = (e) => step(+e.target.value);
  $("film-dropped").onchange = (e) => $("film").classList.toggle("plain", !e.target.checked);
  let open = null;
  for (const figure of figures) figure.querySelector("button").onclick = () => {
    const strip = $("film-strip");
    open = open === figure ? null : figure;
    strip.hidden = !open;
    strip.replaceChildren(...(open ? film.steps : []).map((at, i) => {
      const one = document.createElement("figure"), text = document.createElement("figcaption"), frame = figure.querySelector(".frame").cloneNode(true);
      const boxes = film.images[figure.dataset.image][i], [kept, dropped] = film.totals[figure.dataset.image][i];
      draw(frame.querySelector(".boxes"), boxes);
      text.textContent = "step " + at + ": " + kept + " kept, " + dropped + " dropped";
      one.append(frame, text);
      return one;
    }));
    if (open) strip.scrollIntoView({ block: "nearest" });
  };
  step(film.steps.length - 1);
})();
