"""What answers the policy: environments turn a parsed turn into the next message."""

from stepcredit.environments.search import Response, SearchEnvironment

__all__ = ["Response", "SearchEnvironment"]
