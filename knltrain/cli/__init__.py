"""The command: a module a family of verbs, nothing but parsing and printing."""
