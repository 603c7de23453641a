"""Pipeline schedules: the table of those there are, `register` for a user's own and `load` for one in a file. All get the
same proofs.
"""

from passes.schedules import SCHEDULES, Schedule, load, register, schedule

__all__ = ["SCHEDULES", "Schedule", "load", "register", "schedule"]
