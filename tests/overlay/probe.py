"""Run in a fresh process: imports megatron.core, then MIMO, and prints where all came from."""

import importlib.util
import json
import sys

before = set(sys.modules)
import megatron  # noqa: E402  # what it loads is looked at

loaded_by_megatron = sorted(set(sys.modules) - before)
import torch  # noqa: E402

# its compiler takes two seconds to import, for decorators of functions that nobody calls here
vars(torch)["compile"] = lambda function=None, **_: function or (lambda given: given)
import megatron.core  # noqa: E402  # what is loaded after it, and no more, is looked at

loaded_by_core = [
    name for name in sys.modules if name.startswith(("megatron.core.models.mimo", "megatron.mimo"))
]
training = importlib.util.find_spec("megatron.training")
from megatron.core.models import mimo  # noqa: E402
from megatron.core.models.mimo import MimoModel  # noqa: E402

facts = {
    "loaded_by_megatron": loaded_by_megatron,
    "loaded_by_core": loaded_by_core,
    "megatron": megatron.__file__,
    "path": list(megatron.__path__),
    "core": megatron.core.__file__,
    "training": training and training.origin,
    "mimo": mimo.__file__,
    "mimo_name": mimo.__name__,
    "public_names": sorted(getattr(mimo, "__all__", [])),
    "model": sys.modules[MimoModel.__module__].__file__,
    "model_module": MimoModel.__module__,
}
sys.stdout.write(json.dumps(facts))
