"""``python -m megatron.mimo.convert``; see docs/conversion.md."""

import sys
import warnings

if __name__ == "__main__":
    with warnings.catch_warnings():  # importing Megatron without Transformer Engine
        warnings.simplefilter("ignore")
        # while warnings are off
        from megatron.mimo.convert.command import main
    sys.exit(main())
