"""The run on a GPU machine: `run.sh`, its dry run, its sanitizers and its summary."""
