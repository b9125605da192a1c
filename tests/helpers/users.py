"""Users with other environments than that of the tests."""


def without_home(monkeypatch):
    """Become a user without HOME and without an entry in the list of users."""

    def unknown(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
