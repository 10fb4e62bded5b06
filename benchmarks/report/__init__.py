"""The output: results files, verdicts, tables, plots and pages."""
