"""The only folder that imports ray: it executes the plan with Ray Tune, Train and Data."""

import os

# Read by ray as it is imported: after a job has left its cluster, a thread that still asks for
# something must not start another one.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
