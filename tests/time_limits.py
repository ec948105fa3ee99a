"""How long tests wait for others: limits that tell a hang from work, and expect no speed.

Each is at least five times what the slowest user took on two cores that seven processes shared.
"""

HANG = 600.0  # seconds until a process, a run or a condition counts as one that will not end
SOON = (
    120.0  # seconds for an end that would otherwise come after a collective's ten minutes, or never
)
