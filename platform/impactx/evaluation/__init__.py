"""What results are worth: statistics over repeats and images, calibration, and the quality of maps.

A metric of maps is an extension: one file in `impactx.evaluation.metrics`, or one of a user's own
(see `impactx.evaluation.quality`).
"""
