"""`python -m tafkir` is `tafkir`."""

from __future__ import annotations

from tafkir.cli.main import main

if __name__ == "__main__":
    main()
