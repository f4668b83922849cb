"""Published benchmarks, one file a family; `tafkir.tasks.catalog` finds them by name."""
