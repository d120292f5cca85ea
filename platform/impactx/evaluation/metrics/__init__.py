"""The built-in metrics of maps, one file each; their registry imports every module here."""
