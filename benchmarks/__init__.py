"Speed and memory as ratios that were measured in one run: `python -m benchmarks --list`."
