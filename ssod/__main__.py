import sys

from ssod.cli import main

sys.exit(main())
