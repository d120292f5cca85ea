"""The built-in attributions, one file each; their registry imports every module here."""
