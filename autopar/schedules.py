"""Pipeline schedules: the table of those there are, and `register` for a user's own, which gets the same proofs."""

from passes.schedules import SCHEDULES, Schedule, register, schedule

__all__ = ["SCHEDULES", "Schedule", "register", "schedule"]
