"""Agreement of ranks over their group's store; nothing here communicates through a collective."""

from fuseplan.distributed.agreement import Verdict, agree, agree_in_groups

__all__ = ["Verdict", "agree", "agree_in_groups"]
