"""What came of it: results files, verdicts, tables, plots and pages."""
