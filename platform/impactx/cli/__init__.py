"""The command line that the files in jobs/ share: options, help, exit codes, errors as messages."""
