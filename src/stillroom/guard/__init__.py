"""For owners of teachers: ways of serving that make copying provable, and the tests that prove it.

A sampler (`red_green`, `gumbel`, `tournament`, put into a teacher by `sampler`) or a coin (`twins`) or a code (`canaries`) is drawn with a secret that
is committed to before anything is served. A test then asks whether a suspect's behaviour depends on that secret; of a model that had no part in what
was served it cannot, so that the law of the statistic is known exactly, whatever the model. What each test may claim is in `detector`.
"""
