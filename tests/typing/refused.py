"""What a type checker must refuse: each mark below is itself an error when nothing is wrong there any more."""

from aqueue import AQueue, Context

app = AQueue("typing", broker="memory://")


@app.task
async def plain(x: int, *, y: str = "") -> float:
    return x


@app.task
async def with_context(ctx: Context, x: int) -> list[str]:
    return []


@app.task(run="fork")  # type: ignore[call-overload, untyped-decorator]  # pyright: ignore[reportArgumentType]
def nowhere() -> None: ...


async def use(ctx: Context) -> None:
    await plain.send("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await plain.send()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await plain.send(1, z=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await plain.send(1, countdown=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await plain.options(contdown=3).send(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue, reportUnknownMemberType]
    await plain.options(priority="high").send(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await with_context.send(ctx, 1)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
    wrong: str = await (await plain.send(1)).get()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    print(wrong)
