"""The first module of the server that forks workers: it imports the others and collects no garbage meanwhile.

A collection looks for garbage where there is none yet, and takes a fifth of the imports' time. What the server has
imported is kept out of the workers' collections, which would copy every page of it.
"""

from __future__ import annotations

import gc
import os

gc.disable()
os.register_at_fork(before=gc.freeze, after_in_child=gc.enable)
