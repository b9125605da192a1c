"""What the handlers of a server share."""

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from timemix.server.engine_thread import EngineThread, Served
from timemix.server.errors import ApiError
from timemix.server.state_store import StateStore


@dataclass
class Service:
    """The models of a server, and its limits.

    Args:
        models: The models.
        thread: The thread that steps their engines.
        states: States that clients have stored.
        most_bytes: Largest size of a JSON body in bytes.
    """

    models: Sequence[Served]
    thread: EngineThread
    states: StateStore
    most_bytes: int = 8 * 2**20

    def model(self, name: str | None) -> Served:
        """Return the model with a name; the first model if the name is None or empty.

        Raises:
            ApiError: No model has this name.
        """
        if not name:
            return self.models[0]
        for served in self.models:
            if served.name == name:
                return served
        known = ", ".join(served.name for served in self.models)
        raise ApiError(404, f"there is no model {name!r}; the server has: {known}", "model", "model_not_found")


def service_of(request: HttpRequest) -> Service:
    """Return the service of the app that received a request."""
    service: Service = request.app.state.service
    return service


def owner_of(request: HttpRequest) -> str:
    """Return the digest of the API key of a request, "" if the server has no keys."""
    owner: str = request.state.owner
    return owner
