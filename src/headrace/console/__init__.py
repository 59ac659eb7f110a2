"""What is shown of runs that are over, or go on elsewhere: a page for each, what a folder tells of its run, and how two runs differ."""
