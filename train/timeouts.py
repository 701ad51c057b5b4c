"""The limits of time that a command has unless it names others.

They are apart from what waits, because the options of the command are read
before jax is imported.
"""

#: Seconds to wait for the other processes of a run at the start.
JOIN_TIMEOUT = 120.0
#: Seconds without progress after which a run ends.
STEP_TIMEOUT = 1800.0
