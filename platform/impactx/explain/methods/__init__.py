"""The built-in attributions, one file each; the registry of attributions imports every module here."""
