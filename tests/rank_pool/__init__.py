"""Distributed tests in tens of milliseconds: ranks forked from a server that has imported all.

Importing Megatron costs seconds, so one server process does it once per pytest session. For every
request it forks a supervisor, which forks the ranks and watches over them. The server and the
supervisor never start a thread and never touch CUDA, so that forking them is safe.

    pytest ── control socket ──> server (imports preloaded)
       └───── one socket per run ──> supervisor ──> rank 0 .. rank N-1

Every rank writes its stdout, stderr, result and stack dump to files without a name: nothing is
left in the temporary folder, whoever dies.
"""

from tests.rank_pool.outcome import RankExit, RanksFailedError
from tests.rank_pool.parallel import model_parallel
from tests.rank_pool.pool import RankPool
from tests.rank_pool.run import ScriptRun

__all__ = ["RankExit", "RankPool", "RanksFailedError", "ScriptRun", "model_parallel"]
