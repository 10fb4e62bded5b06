"""Module that patches verl when it is imported, in every process of a run.

The entry point `verl.plugins` loads it, as does the environment variable
`VERL_USE_EXTERNAL_MODULES=ppo_fast.integrations.verl_plugin`. verl skips an entry point that
raises without a word, so an error is written to standard error as well as raised.
`VERL_USE_EXTERNAL_PLUGINS=none` keeps the entry point out. `PPO_FAST_VERL_OPS=gae,logprobs` names
the ops to patch, of those on request too.
"""

import os
import sys

from ppo_fast.integrations.verl import integration

# A process may come here twice: by the environment variable and then by the entry point.
if not integration.calls:
    try:
        named = os.environ.get("PPO_FAST_VERL_OPS")
        places = integration.apply(tuple(named.split(",")) if named else None)
    except Exception as error:
        print(f"ppo_fast: verl runs without ppo_fast: {error}", file=sys.stderr, flush=True)
        raise
    print(f"ppo_fast: patched {', '.join(places)}", file=sys.stderr, flush=True)
