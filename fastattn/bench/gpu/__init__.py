"""The benchmark on a GPU, `python -m fastattn bench --gpu`: whether all results are right, then how fast.

`check` runs the tests' cases on the device, `contenders` makes the calls, `device` times and describes,
`runner` puts results together, `goals` says what is promised, `report` writes it down, `plot` draws. The
cases are in `fastattn.testing.gpu_bench_cases`; statistics, counting and calls are the CPU benchmark's.
"""
