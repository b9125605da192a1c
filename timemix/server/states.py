"""The endpoints of /v1/states: read a text once, continue it often, save it to a file and load it."""

from starlette.concurrency import run_in_threadpool
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from timemix.errors import FileError
from timemix.generation.session import Session, session_from_bytes
from timemix.server.completions import build_request, engine_fields, prompts_of, state_fields
from timemix.server.engine_thread import Stream
from timemix.server.errors import ApiError
from timemix.server.fields import Fields, checked, read_body
from timemix.server.responses import while_connected
from timemix.server.service import owner_of, service_of
from timemix.server.state_store import ID, LONGEST_NAME, Description, largest_file


async def create_state(request: HttpRequest) -> Response:
    """Answer POST /v1/states: read a text, and store the state after it."""
    service, owner = service_of(request), owner_of(request)
    fields = await Fields.read(request, service.most_bytes)
    served = service.model(fields.text("model"))
    name, parent = _name(fields.text("name")), fields.text("state")
    asked = engine_fields(fields, served, 0) | await state_fields(request, fields, served)
    asked |= {"tokens": 0, "samples": 1, "keep_session": True}
    prompts = await run_in_threadpool(prompts_of, fields, served.tokenizer)
    if len(prompts) > 1:
        raise ApiError(400, f"prompt holds {len(prompts)} prompts; give one", "prompt")
    service.states.check_room(largest_file(served.engine.model))
    built = await run_in_threadpool(build_request, prompts[0].ids, asked, served, "prompt")
    stream = checked("prompt", lambda: service.thread.submit(served, [built]))

    async def store() -> Response:
        session = await _read(stream)
        found = await run_in_threadpool(service.states.add, owner, served, session, name=name, parent=parent)
        return _answer(found)

    return await while_connected(request.receive, stream, store())


async def _read(stream: Stream) -> Session:
    """Return the session after the prompt of a request without new tokens, which cannot fail."""
    (_, event), *_ = await stream.take()
    assert event.session is not None
    return event.session


async def list_states(request: HttpRequest) -> Response:
    """Answer GET /v1/states: the states of the API key."""
    states = service_of(request).states
    found = await run_in_threadpool(states.descriptions, owner_of(request))
    return JSONResponse({"object": "list", "data": [each.json() for each in found]})


async def load_state(request: HttpRequest) -> Response:
    """Answer GET /v1/states/ID: the file of the state."""
    id = request.path_params["id"]
    content = await run_in_threadpool(service_of(request).states.content, owner_of(request), id)
    headers = {"Content-Disposition": f'attachment; filename="{id}.state"', "Cache-Control": "no-store"}
    return Response(content, headers=headers, media_type="application/octet-stream")


async def save_state(request: HttpRequest) -> Response:
    """Answer PUT /v1/states/ID: store a file of a state under an id that the client has drawn."""
    service, owner, id = service_of(request), owner_of(request), request.path_params["id"]
    service.thread.refuse_if_closing()
    if not ID.fullmatch(id):
        raise ApiError(400, f'the id is {id[:60]!r}; it must be "state-" and 32 random hexadecimal digits', "id")
    served = service.model(request.query_params.get("model"))
    name, most = _name(request.query_params.get("name")), largest_file(served.engine.model)

    def store(content: bytes) -> Description:
        try:
            session = session_from_bytes(content, served.engine.model)
        except FileError as error:
            raise ApiError(400, str(error)) from None
        return service.states.add(owner, served, session, name=name, id=id)

    with service.states.reserved(most):
        return _answer(await run_in_threadpool(store, await read_body(request, most)))


async def delete_state(request: HttpRequest) -> Response:
    """Answer DELETE /v1/states/ID."""
    id = request.path_params["id"]
    await run_in_threadpool(service_of(request).states.remove, owner_of(request), id)
    return JSONResponse({"id": id, "object": "state", "deleted": True})


async def fork_state(request: HttpRequest) -> Response:
    """Answer POST /v1/states/ID/fork: copy a state. The body may be empty."""
    service = service_of(request)
    service.thread.refuse_if_closing()
    fields = await Fields.read(request, service.most_bytes, empty=b"{}")
    name = _name(fields.text("name"))
    return _answer(await run_in_threadpool(service.states.fork, owner_of(request), request.path_params["id"], name))


class AllStates(HTTPEndpoint):
    """The methods of /v1/states. As one route, they all stand in the header Allow of an answer 405."""

    get, post = staticmethod(list_states), staticmethod(create_state)


class OneState(HTTPEndpoint):
    """The methods of /v1/states/ID."""

    get, put, delete = staticmethod(load_state), staticmethod(save_state), staticmethod(delete_state)


def _answer(description: Description) -> JSONResponse:
    return JSONResponse(description.json())


def _name(name: str | None) -> str | None:
    """Return the name of a state after a check."""
    if name is not None and len(name) > LONGEST_NAME:
        raise ApiError(400, f"name has {len(name)} characters; give at most {LONGEST_NAME}", "name")
    return name or None
