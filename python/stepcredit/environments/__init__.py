"""What answers the policy: environments turn a parsed turn into the next message."""

from stepcredit.environments.base import Environment, Response
from stepcredit.environments.clarify import ClarifyEnvironment
from stepcredit.environments.search import SearchEnvironment

__all__ = ["ClarifyEnvironment", "Environment", "Response", "SearchEnvironment"]
