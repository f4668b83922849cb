"""The page that explains a run: reads the run directory only, writes `report.html` and `report.md`."""
