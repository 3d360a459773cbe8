"""Every system and every table and figure of the paper: what is run, what a run leaves, and how it is shown."""
