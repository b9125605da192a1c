from timemix.cli.main import main
from timemix.cli.terminal import exit_process

if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        exit_process(end.code if isinstance(end.code, int) else 0)
