"""How hypothesis runs here: the same examples every time and nothing written to disk, so that a failure is a change of ours."""

from hypothesis import settings

settings.register_profile("fast", max_examples=25, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=1000, deadline=None, database=None)  # pytest --hypothesis-profile=thorough
settings.load_profile("fast")
