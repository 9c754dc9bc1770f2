"""What tests share: `from support.ranks import ...` (ranks as threads), `support.processes` (ranks as gloo processes),
`support.reference` (attention of one process in float64), `support.cases` (a whole attention problem, run and compared).
"""
