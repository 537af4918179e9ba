"""The commands, one file each, with the options that they share and the tables that they print."""
