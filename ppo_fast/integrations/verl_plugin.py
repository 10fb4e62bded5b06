"""Importing this patches verl: what the entry point `verl.plugins` and the environment variable
`VERL_USE_EXTERNAL_MODULES=ppo_fast.integrations.verl_plugin` load in every process of a run.

verl skips an entry point that raises without a word: what is wrong is therefore said on standard
error as well as raised. `VERL_USE_EXTERNAL_PLUGINS=none` keeps the entry point out.
"""

import sys

from ppo_fast.integrations.verl import integration

# A process may come here twice: by the environment variable and then by the entry point.
if not integration.calls:
    try:
        places = integration.apply()
    except Exception as error:
        print(f"ppo_fast: verl runs without ppo_fast: {error}", file=sys.stderr, flush=True)
        raise
    print(f"ppo_fast: patched {', '.join(places)}", file=sys.stderr, flush=True)
