"""Builds a folder of nine hours of real speech, 58 voices, from Debian's packages.

    apt-get update; python -m recipes.debian_speech --out speech      fetches about 600 MB

OUT/{train,seen,valid,test,more,noise}/<voice>/*.flac at 8 kHz. Every 20th recording of a training
voice goes to `seen`: known voices, unheard sentences. `more` holds further voices to train on,
whole, and `noise` what is no voice. Silence at both ends of recordings is cut, and those shorter
than 0.3 s are left out.
"""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

from data import DataError, read_audio, resample
from program import Parser, new_folder, run_program

RATE = 8000  # Hz
SHORTEST = 0.3  # seconds

# {voice: (Debian packages, pattern of its files below usr/share)}. Voices recorded for telephone
# exchanges, two games and the talking stamps of a drawing program; every language of one program is
# another reader.
VOICES = {}
ASTERISK = {
    "allison": ["core-sounds-en", "core-sounds-es"],
    "june": ["core-sounds-fr"],
    "carlo": ["core-sounds-it"],
    "menardi": ["prompt-it-menardi"],
    "ivrvoice": ["core-sounds-ru"],
}
for voice, packages in ASTERISK.items():
    packages = [f"asterisk-{package}-wav" for package in packages]
    pattern = rf"(?i)asterisk/sounds/\w+_{voice}\w*/(?!silence/).*\.wav"
    VOICES[voice] = (packages, pattern)
for lang in ("cs", "nl"):
    for size, mark in (("small", "m"), ("big", "v")):
        pattern = rf"games/fillets-ng/sound/[^/]+/{lang}/.*-{mark}-.*\.ogg"
        VOICES[f"fish_{size}_{lang}"] = ([f"fillets-ng-data-{lang}"], pattern)
for lang in "ro es ru fr bg el be ca da".split():
    pattern = rf"tuxpaint/stamps/.*_desc_{lang}\.ogg"
    VOICES[f"stamps_{lang}"] = (["tuxpaint-stamps-default"], pattern)
for lang in "ca da de el en fr gl lt ru sl uk wa nn".split():
    pattern = rf"ktuberling/sounds/{lang}/.*\.(wav|ogg|opus)"
    VOICES[f"ktuberling_{lang}"] = (["ktuberling-data"], pattern)
# The same drawing program's animals, tools and bells: noise.
VOICES["stamps_sounds"] = (
    ["tuxpaint-stamps-default"],
    r"tuxpaint/stamps/(?!symbols|.*_[a-z]{2}(_\w+)?\.).*\.(ogg|wav)",
)

# Three voices choose hyperparameters, ktuberling's thirteen are only ever scored, all others may be
# trained on.
VALID_VOICES = {"stamps_be", "stamps_ca", "stamps_da"}

# More voices to train on, a minute or so each but for the first three and the Malayalam reader: two
# more telephone exchanges, two readers of Chinese syllables, the readers of KDE's alphabets and a
# game's characters. KDE doesn't say who its readers are, so the languages of ktuberling's readers,
# and those spoken next door, stay out.
MORE_VOICES = {
    "armelle": (["asterisk-prompt-fr-armelle"], r"asterisk/sounds/fr/.*\.gsm"),
    "july": (["asterisk-prompt-es-co"], r"asterisk/sounds/es/.*\.gsm"),
    "gcin_3": (["gcin-voice"], r"gcin-voice/ogg/[^/]+/3\.ogg"),
    "gcin_5": (["gcin-voice"], r"gcin-voice/ogg/[^/]+/5\.ogg"),
}
for lang in "ar cs he hu it ml nl pt_BR tn".split():
    MORE_VOICES[f"klettres_{lang}"] = (["klettres-data"], rf"klettres/{lang}/.*\.(wav|ogg)")
CHARACTERS = (
    "British Classic Default Default_es Default_pl Default_ru Default_uk HillBilly Mobster Pirate "
    "Russian Russian_pl Singer Surfer"
)
for character in CHARACTERS.split():
    pattern = rf"games/hedgewars/Data/Sounds/voices/{character}/.*\.ogg"
    MORE_VOICES[f"hedgewars_{character.lower()}"] = (["hedgewars-data"], pattern)


def build_debian_speech(out) -> None:
    """Builds the folder. Raises DataError where Debian's tools are missing or fail."""
    voices = {**VOICES, **MORE_VOICES}
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(
                f"{tool} not found: the speech is Debian's, run this on Debian or Ubuntu"
            )
    with new_folder(out) as folder:
        unpacked = folder / ".packages"
        unpacked.mkdir()
        names = {name for packages, _ in voices.values() for name in packages}
        for name in tqdm(sorted(names), desc="fetching packages"):
            fetch_package(name, unpacked)
        for voice, (packages, pattern) in tqdm(voices.items(), desc="converting voices"):
            paths = []
            for name in packages:
                paths += find_files(unpacked / name / "usr" / "share", pattern)
            for index, path in enumerate(paths):
                if sf.info(path).duration < SHORTEST:
                    continue
                audio, rate = read_audio(path)
                audio = resample(audio - audio.mean(), rate, RATE)
                audio = trim_silence(audio, RATE)
                if len(audio) < SHORTEST * RATE:
                    continue
                target = folder / split_of(voice, index) / voice / f"{index:04d}.flac"
                target.parent.mkdir(parents=True, exist_ok=True)
                sf.write(target, audio.clip(-1, 1), RATE, subtype="PCM_16")
        shutil.rmtree(unpacked)


def fetch_package(name: str, folder: Path) -> None:
    """Fetches a Debian package and unpacks it into `folder`/`name`. Raises DataError."""
    command = ["apt-get", "download", name]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode:
        raise DataError(f"apt-get download {name} failed: run `apt-get update` first")
    archive = next(folder.glob(f"{name}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", archive, folder / name], check=True)


def find_files(base: Path, pattern: str) -> list[Path]:
    """The files below a folder whose path from there fits a pattern, in order."""
    return sorted(p for p in base.rglob("*") if re.fullmatch(pattern, str(p.relative_to(base))))


def trim_silence(audio: np.ndarray, rate: int) -> np.ndarray:
    """Cuts both ends where they lie more than 34 dB under the loudest 20 ms, but for 50 ms.

    [T] -> [<= T]
    """
    window = max(rate // 50, 1)
    power = np.convolve(audio.astype(np.float64) ** 2, np.ones(window) / window, "same")
    envelope = np.sqrt(power)
    loud = np.flatnonzero(envelope > 0.02 * envelope.max())
    if len(loud) == 0:
        return audio[:0]
    return audio[max(loud[0] - rate // 20, 0) : loud[-1] + rate // 20]


def split_of(voice: str, index: int) -> str:
    """The split of a voice's recording number `index`."""
    if voice == "stamps_sounds":
        return "noise"
    if voice.startswith("ktuberling"):
        return "test"
    if voice in VALID_VOICES:
        return "valid"
    if voice in MORE_VOICES:
        return "more"
    return "train" if index % 20 else "seen"


def main() -> None:
    parser = Parser(description="Builds a folder of speech from Debian's packages.")
    parser.add_argument("--out", required=True, help="new folder")
    args = parser.parse_args()
    build_debian_speech(args.out)


if __name__ == "__main__":
    run_program(main)
