"""Eight simulated devices for every test, and compiled programs kept between runs."""

import os
from pathlib import Path

# Before JAX initialises; processes that tests start inherit them.
flag = "--xla_force_host_platform_device_count"
if flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
cache = Path(__file__).parents[1] / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
