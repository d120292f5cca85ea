"""What results are worth: statistics over repeats and images, calibration, MoRF curves, fidelity of maps."""
