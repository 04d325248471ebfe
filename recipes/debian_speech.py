"""Builds a folder of nine hours of real speech, 58 voices, from Debian's packages (about 600 MB to fetch).

    apt-get update; python -m recipes.debian_speech --out speech
"""

import itertools
import re
import shutil
import subprocess

import numpy as np
import soundfile as sf
from tqdm import tqdm

from checkpoint import run_program
from data import DataError, Parser, read_audio, resample
from recipes.mix import new_folder

# {speaker: (Debian packages, pattern below usr/share)}: voices recorded for telephone exchanges, two games and the
# talking stamps of a drawing program; every language of one program is another reader.
ASTERISK = {
    "allison": "core-sounds-en core-sounds-es",
    "june": "core-sounds-fr",
    "carlo": "core-sounds-it",
    "menardi": "prompt-it-menardi",
    "ivrvoice": "core-sounds-ru",
}
VOICES = {
    voice: ([f"asterisk-{p}-wav" for p in packages.split()], rf"(?i)asterisk/sounds/\w+_{voice}\w*/(?!silence/).*\.wav")
    for voice, packages in ASTERISK.items()
}
for lang, (size, mark) in itertools.product(["cs", "nl"], [("small", "m"), ("big", "v")]):
    pattern = rf"games/fillets-ng/sound/[^/]+/{lang}/.*-{mark}-.*\.ogg"
    VOICES[f"fish_{size}_{lang}"] = ([f"fillets-ng-data-{lang}"], pattern)
for lang in "ro es ru fr bg el be ca da".split():
    VOICES[f"stamps_{lang}"] = (["tuxpaint-stamps-default"], rf"tuxpaint/stamps/.*_desc_{lang}\.ogg")
for lang in "ca da de el en fr gl lt ru sl uk wa nn".split():
    VOICES[f"ktuberling_{lang}"] = (["ktuberling-data"], rf"ktuberling/sounds/{lang}/.*\.(wav|ogg|opus)")
# Three voices choose hyperparameters, thirteen are only ever scored, all others may be trained on.
VALID_VOICES = {"stamps_be", "stamps_ca", "stamps_da"}
# The same program's animals, tools and bells: noise.
SOUNDS = r"tuxpaint/stamps/(?!symbols|.*_[a-z]{2}(_\w+)?\.).*\.(ogg|wav)"
VOICES["stamps_sounds"] = (["tuxpaint-stamps-default"], SOUNDS)

# More voices to train on, a minute or so each but for the first three and the Malayalam reader: two more telephone
# exchanges, two readers of Chinese syllables, the readers of KDE's alphabets and a game's characters. KDE doesn't say
# who its readers are, so the languages of ktuberling's readers, and those spoken next door, stay out.
MORE_VOICES = {
    "armelle": (["asterisk-prompt-fr-armelle"], r"asterisk/sounds/fr/.*\.gsm"),
    "july": (["asterisk-prompt-es-co"], r"asterisk/sounds/es/.*\.gsm"),
    "gcin_3": (["gcin-voice"], r"gcin-voice/ogg/[^/]+/3\.ogg"),
    "gcin_5": (["gcin-voice"], r"gcin-voice/ogg/[^/]+/5\.ogg"),
}
for lang in "ar cs he hu it ml nl pt_BR tn".split():
    MORE_VOICES[f"klettres_{lang}"] = (["klettres-data"], rf"klettres/{lang}/.*\.(wav|ogg)")
for character in (
    "British Classic Default Default_es Default_pl Default_ru Default_uk "
    "HillBilly Mobster Pirate Russian Russian_pl Singer Surfer"
).split():
    pattern = rf"games/hedgewars/Data/Sounds/voices/{character}/.*\.ogg"
    MORE_VOICES[f"hedgewars_{character.lower()}"] = (["hedgewars-data"], pattern)


def trim_silence(audio: np.ndarray, rate: int) -> np.ndarray:
    """Cuts what lies more than 34 dB under the loudest 20 ms at both ends, but for 50 ms; [T] -> [<= T]."""
    window = max(rate // 50, 1)
    envelope = np.sqrt(np.convolve(audio.astype(np.float64) ** 2, np.ones(window) / window, "same"))
    loud = np.flatnonzero(envelope > 0.02 * envelope.max())
    return audio[max(loud[0] - rate // 20, 0) : loud[-1] + rate // 20] if len(loud) else audio[:0]


def build_debian_speech(out, sample_rate: int = 8000) -> None:
    """Builds `out`/{train,seen,valid,test,more,noise}/<voice>/*.flac.

    Every 20th recording of a training voice goes to `seen`: known voices, unheard sentences. `more` holds further
    voices to train on, whole. Recordings shorter than 0.3 s are left out. Raises DataError where apt-get fails.
    """
    voices = {**VOICES, **MORE_VOICES}
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"{tool} not found: the speech comes from Debian's packages, run this on Debian or Ubuntu")
    with new_folder(out) as folder:
        unpacked = folder / ".packages"
        unpacked.mkdir()
        packages = sorted({package for packages, _ in voices.values() for package in packages})
        for package in tqdm(packages, desc="fetching packages"):
            try:
                subprocess.run(["apt-get", "download", package], cwd=unpacked, check=True, capture_output=True)
            except subprocess.CalledProcessError:
                raise DataError(f"apt-get download {package} failed: run `apt-get update` first") from None
            archive = next(unpacked.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", archive, unpacked / package], check=True)
        for voice, (packages, pattern) in tqdm(voices.items(), desc="converting voices"):
            paths = []
            for package in packages:
                base = unpacked / package / "usr" / "share"
                paths += sorted(p for p in base.rglob("*") if re.fullmatch(pattern, str(p.relative_to(base))))
            for index, path in enumerate(paths):
                if sf.info(path).duration < 0.3:
                    continue
                audio, rate = read_audio(path)
                audio = trim_silence(resample(audio - audio.mean(), rate, sample_rate), sample_rate)
                if len(audio) < 0.3 * sample_rate:
                    continue
                split = "more" if voice in MORE_VOICES else "train" if index % 20 else "seen"
                split = "noise" if voice == "stamps_sounds" else split
                split = "test" if voice.startswith("ktuberling") else "valid" if voice in VALID_VOICES else split
                target = folder / split / voice / f"{index:04d}.flac"
                target.parent.mkdir(parents=True, exist_ok=True)
                sf.write(target, np.clip(audio, -1, 1), sample_rate, subtype="PCM_16")
        shutil.rmtree(unpacked)


def main() -> None:
    parser = Parser(description="Builds a folder of speech from Debian's packages.")
    parser.add_argument("--out", required=True)
    build_debian_speech(parser.parse_args().out)


if __name__ == "__main__":
    run_program(main)
