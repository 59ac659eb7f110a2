"""What a training's loop is given, wherever it runs: its shard of the rows, its run, and where it got to."""
