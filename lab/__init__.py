"""The desk: command line, options, reports; and the rooms of extras, studies and tests."""
