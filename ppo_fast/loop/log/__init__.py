"""Log of a run: records, alarms, progress and the folder's lock."""
