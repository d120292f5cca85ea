"""The only folder that imports ray: it executes the plan with Ray Tune, Train and Data."""
