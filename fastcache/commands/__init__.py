"""One file a group of commands: flags -> calls of the library. Everything heavy is imported inside a command."""
