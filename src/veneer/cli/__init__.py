"""The command line: one thin file a command, each importing what it needs when it is called."""
