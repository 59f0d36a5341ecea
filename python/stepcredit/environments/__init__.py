"""What answers the policy: environments turn a parsed turn into the next message."""

from stepcredit.environments.base import Environment
from stepcredit.environments.clarify import ClarifyEnvironment
from stepcredit.environments.search import Response, SearchEnvironment

__all__ = ["ClarifyEnvironment", "Environment", "Response", "SearchEnvironment"]
