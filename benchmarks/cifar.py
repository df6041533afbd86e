"""CIFAR-10 and the trained ResNets of shared/data: read, built, tested."""
import lzma
import numpy as np
import torch, torch.nn as nn, torch.nn.functional as F

MEAN, STD = (.485, .456, .406), (.229, .224, .225)  # what the ResNets were trained with


class Block(nn.Module):
    def __init__(self, before, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.stride, self.extra = stride, (planes - before)//2

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1: x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))  # He et al.'s option A: no weights
        return F.relu(out + x)


class ResNet(nn.Module):
    "He et al., 2015, section 4.2: 6n + 2 layers for 32x32 images"
    def __init__(self, n):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        stage = lambda before, planes, stride: nn.Sequential(*(Block(planes if i else before, planes, 1 if i else stride) for i in range(n)))
        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


DEPTHS = dict(resnet20=3, resnet56=9)


def trained(folder, name):
    model = ResNet(DEPTHS[name])
    model.load_state_dict(torch.load(folder/'cifar10_resnets'/f'{name}.pt', weights_only=True))
    return model.eval()


def images(folder, part):
    "uint8 images [n, 3, 32, 32] of `test`, or of training batch 1 to 5, and their labels"
    file = folder/'cifar10'/('test_batch.xz' if part == 'test' else f'data_batch_{part}.xz')
    differences = np.frombuffer(lzma.decompress(file.read_bytes()), np.uint8).reshape(3, -1, 32, 32)
    x = differences.cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
    x[0] += x[1]
    x[2] += x[1]
    labels = np.load(folder/'cifar10'/'labels.npz')
    y = labels['test'] if part == 'test' else labels['train'][(part - 1)*10000:part*10000]
    return torch.from_numpy(x.transpose(1, 0, 2, 3).copy()), torch.from_numpy(y)


def normalised(x):
    stats = [torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD)]
    return (x.float()/255 - stats[0])/stats[1]


def shifted(x, generator):
    "Each image flipped by chance and moved by up to 4 pixels, black outside"
    n = len(x)
    flip = torch.rand(n, generator=generator) < .5
    x = torch.where(flip.view(-1, 1, 1, 1).to(x.device), x.flip(3), x)
    top, left = torch.randint(0, 9, (2, n), generator=generator)
    rows, columns = (at.view(-1, 1).to(x.device) + torch.arange(32, device=x.device) for at in (top, left))
    padded = F.pad(x, (4, 4, 4, 4))
    return padded[torch.arange(n, device=x.device).view(-1, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model, x, y):
    "% right"
    model.eval()
    return 100*sum(int((model(normalised(a)).argmax(1) == b).sum()) for a, b in zip(x.split(50), y.split(50)))/len(y)
