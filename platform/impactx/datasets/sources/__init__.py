"""The sources of images, one file each; a user's own source is such a file too.

`impactx.datasets.sources.base` documents what a source must return. `impactx.settings.extensions`
holds the registry, whose decorator makes a source usable by its name:

    from impactx.datasets.sources.base import Location, Part, Source
    from impactx.settings.extensions import source
"""
