"""What tests share, as `from support.ranks import ...`.

ranks: ranks as threads. processes: ranks as gloo processes. reference: attention of one process in float64.
cases: a whole attention problem, run and compared. grid: a small set of cases that covers all pairs of factors.
"""
